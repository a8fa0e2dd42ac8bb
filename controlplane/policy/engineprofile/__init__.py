"""How to run a model: from its shape, the accelerator and the promise to an engine's settings, each with its reason.

`compile_profile` (compiling.py) is the one entry; the other files hold one group of settings each. Called by
controlplane/deployments/profiles.py when a deployment is written, and by `manage.py profile`. Pure.
"""
