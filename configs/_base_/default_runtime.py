default_scope = "mmengine"
custom_imports = dict(imports=["backbones", "backbones.mm"], allow_failed_imports=False)

# Merged by key: a leaf changes a hook by its key. custom_hooks stays free for what a recipe adds, as EMAHook.
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50),
    checkpoint=dict(
        type="CheckpointHook",
        interval=1,
        max_keep_ckpts=2,
        save_best="auto",
        backend_args=dict(backend="atomic"),
    ),
    finite_loss=dict(type="FiniteLossHook"),
    resume=dict(type="ResumeHook"),
    progress=dict(type="ProgressHook"),
    report=dict(type="ReportHook"),
)

visualizer = dict(
    type="Visualizer",
    vis_backends=[dict(type="LocalVisBackend"), dict(type="TensorboardVisBackend")],
)

env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
# Without a fixed seed a resumed run would draw its images in another order.
randomness = dict(seed=0)
