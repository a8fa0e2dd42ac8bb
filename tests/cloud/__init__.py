"""EC2 without Amazon: moto behind a layer that fails as clouds do, and a hypervisor that boots what is bought."""
