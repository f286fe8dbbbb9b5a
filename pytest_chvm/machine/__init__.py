"""One VM's life: what is chosen for it, its launch, `Vm`, its health, devices that come and go."""
