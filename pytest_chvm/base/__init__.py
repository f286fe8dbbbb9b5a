"""What everything stands on: deadlines, text, watches, locks, the cache, progress. Nothing here knows what a VM is."""
