"""Triton kernels of the DQN loss and the sizes they are launched with. Installed as ``dqn_fused.kernels``."""
