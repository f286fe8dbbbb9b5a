"""What the guest is and what it says. Nothing here starts a process of the host's or knows a VMM."""
