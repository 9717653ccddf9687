"""Package metadata, and the build of the optional C++ kernel of the `cpu` backend, which also serves a GPU's host.

The kernel is a plain shared library without Python or PyTorch headers, loaded by ctypes: one build serves every version
of both, so the wheel is tagged py3-none-<platform>. Its inner loops are compiled once per instruction set and chosen at
run time. Without a working compiler the installation succeeds, and the library runs on its Python operators.

For development: python setup.py build_ext --inplace
"""

import re
import shutil
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
URL = None  # of the repository; with it the index gets project URLs, and the README absolute links
CSRC = "backbones/ops/csrc"
DISPATCH = [f"{CSRC}/{name}.cpp" for name in ("dispatch", "depthwise", "pointwise", "program")]
# Compiled for every instruction set:
KERNELS = [f"{CSRC}/{name}_kernels.cpp" for name in ("scan", "depthwise", "pointwise")]
KERNEL = "backbones.ops._scan_cpu"
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")  # as backbones/ops/native.py expects it

# Never -ffast-math: exp2 relies on the rounding that IEEE prescribes.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
]
ISA_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"],
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}


class BuildKernel(build_ext):
    """Compiles the kernels for every instruction set of the target and links them to one library."""

    def run(self) -> None:
        try:
            super().run()
        except (BaseError, CCompilerError, OSError) as error:
            if not self.inplace:  # what an earlier build has left there
                Path(self.get_ext_fullpath(KERNEL)).unlink(missing_ok=True)
            self.extensions = []
            self.warn(
                f"the C++ kernel was not built ({error}). ssm-backbones works without it, on slower Python operators; "
                "for the kernel install g++ or clang++ and install again."
            )

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + SUFFIX

    def build_extension(self, ext: Extension) -> None:
        x86 = self.builds("#ifndef __x86_64__\n#error\n#endif\n", FLAGS + ISA_FLAGS["avx512"])
        openmp = self.builds("#include <omp.h>\nint f() { return omp_get_max_threads(); }\n", ["-fopenmp"])
        threads = ["-fopenmp" if openmp else "-pthread"]
        macros = [("SCAN_X86", "1")] if x86 else []

        jobs = [(source, "dispatch", macros, FLAGS + threads) for source in DISPATCH]
        for isa in ISA_FLAGS if x86 else ["baseline"]:
            jobs += [(source, isa, [*macros, ("SCAN_ISA", isa)], FLAGS + ISA_FLAGS[isa]) for source in KERNELS]

        def compile_one(job: tuple) -> list:
            source, name, macros, flags = job
            folder = f"{self.build_temp}/{name}"
            return self.compiler.compile([source], folder, macros, extra_postargs=flags)

        with ThreadPoolExecutor() as pool:
            objects = [name for names in pool.map(compile_one, jobs) for name in names]
        self.link(objects, self.get_ext_fullpath(ext.name), threads)

    def link(self, objects: list, path: str, flags: list) -> None:
        self.compiler.link_shared_object(objects, path, extra_postargs=flags, target_lang="c++")

    def builds(self, source: str, flags: list) -> bool:
        """Whether the compiler makes a library of this source with these flags."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "probe.cpp")
            path.write_text(source, encoding="utf-8")
            try:
                objects = self.compiler.compile([str(path)], folder, extra_postargs=flags)
                self.link(objects, f"{folder}/probe{SUFFIX}", flags)
            except CCompilerError:
                return False
            return True


class BuildPackage(build_py):
    """Adds configs, their index and the scripts that run them, where OpenMMLab's tools look for them.

    In a clone, backbones/.mim holds links to them.
    """

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            mim = Path(self.build_lib, "backbones", ".mim")
            shutil.rmtree(mim, ignore_errors=True)
            shutil.copytree(ROOT / "configs", mim / "configs", ignore=shutil.ignore_patterns("__pycache__"))
            shutil.copy2(ROOT / "model-index.yml", mim)
            (mim / "tools").mkdir()
            for script in ("train.py", "test.py"):  # which `mim train` and `mim test` call
                shutil.copy2(ROOT / "tools" / script, mim / "tools")


class Wheel(bdist_wheel):
    """A wheel for any Python 3, and for this platform if the kernel is in it."""

    def get_tag(self) -> tuple:
        kernel = Path(self.get_finalized_command("build_ext").get_ext_fullpath(KERNEL))
        self.root_is_pure = not kernel.exists()
        return ("py3", "none", "any" if self.root_is_pure else super().get_tag()[2])


def version() -> str:
    text = (ROOT / "backbones" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)[1]


def long_description() -> str:
    """The README without the links that lead nowhere on an index page: relative ones, unless :data:`URL` is known."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    relative = r"(?!https?:|mailto:|#)([^)\s]+)"
    if URL is None:
        text = re.sub(rf"!\[[^\]]*\]\({relative}\)", "", text)
        return re.sub(rf"\[([^\]]+)\]\({relative}\)", r"\1", text)
    text = re.sub(rf"(!\[[^\]]*\])\({relative}\)", rf"\1({URL}/raw/main/\2)", text)
    return re.sub(rf"(\[[^\]]+\])\({relative}\)", rf"\1({URL}/blob/main/\2)", text)


setup(
    name="ssm-backbones",
    version=version(),
    description="Visual state-space backbones (Vim, VMamba and kin) for timm and OpenMMLab, on any device",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={"Source": URL, "Changelog": f"{URL}/blob/main/CHANGELOG.md"} if URL else {},
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE.md"],
    python_requires=">=3.10",
    packages=find_packages(include=["backbones", "backbones.*"]),
    py_modules=["ssm_backbones"],
    entry_points={"console_scripts": ["ssm-backbones = ssm_backbones:main"]},
    package_data={"backbones": ["py.typed", "zoo/*.yml", "ops/csrc/*"]},
    install_requires=[
        "torch>=2.4",
        "timm>=1.0.22",
        "einops",
        "huggingface_hub",
        "numpy",
        "pillow",
        "packaging",
        "pyyaml",
        "rich",
        "safetensors",
    ],
    extras_require={
        "mm": [
            "onedl-mmengine",
            "onedl-mmcv",
            "onedl-mmdetection",
            "onedl-mmsegmentation",
            "opencv-python-headless",
            "contourpy",
            "matplotlib",
            "scikit-image",
            "scikit-learn",
            "scipy",
            "tensorboard",
            "torchvision",
        ],
        "triton": ["triton"],
        "onnx": ["onnx", "onnxruntime", "onnxscript"],
        "dev": [
            "matplotlib",
            "mypy",
            "pre-commit",
            "pytest",
            "pytest-xdist",
            "ruff",
            "scikit-learn",
            "types-PyYAML",
        ],
    },
    ext_modules=[Extension(KERNEL, [*DISPATCH, *KERNELS])],
    cmdclass={"build_ext": BuildKernel, "build_py": BuildPackage, "bdist_wheel": Wheel},
    zip_safe=False,
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: C++",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
