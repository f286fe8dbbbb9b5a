"""Stock images: what system is on one, and what is put in front of it so that it boots as a guest of ours, unchanged."""
