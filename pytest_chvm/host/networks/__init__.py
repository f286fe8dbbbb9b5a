"""What VMs' networks need of the host, one file a kind: TAPs, user mode, isolated networks; and the subnets for all of them."""
