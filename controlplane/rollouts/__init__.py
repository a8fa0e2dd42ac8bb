"""Engine profiles of deployments, and how a new one reaches traffic: as a canary that is watched."""
