"""What a person sees of VMs afterwards: sections of a test's report, and kept logs."""
