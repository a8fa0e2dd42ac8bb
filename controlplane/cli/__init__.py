"""`corral`: the command line of the provisioning API. Imports no Django; starts in a tenth of a second."""
