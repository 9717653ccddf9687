_base_ = [
    "models/upernet.py",
    "datasets/ade20k.py",
    "schedules/ade20k_160k.py",
    "mmseg_runtime.py",
]
