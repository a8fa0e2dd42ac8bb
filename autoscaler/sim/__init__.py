"""Event simulator of the whole house: the production policies, run against recorded workloads on a virtual clock."""
