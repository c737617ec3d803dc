"""Measure and report: measure/ times, gpu_code/ reads and executes GPU code without a GPU, reporting/ writes it down.

``python -m bench --help`` says what there is. An agent and its own replay batches are ``python -m bench demo``.
"""
