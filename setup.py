"""Build of dqn_fused: the folder kernels/ is installed as the package dqn_fused.kernels."""

from setuptools import setup

setup(
    packages=["dqn_fused", "dqn_fused._backends", "dqn_fused.kernels"],
    package_dir={"dqn_fused": "dqn_fused", "dqn_fused.kernels": "kernels"},
    package_data={"dqn_fused": ["py.typed"]},
)
