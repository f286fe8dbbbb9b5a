"""How commands and files get into a guest and out of it: a folder or file a channel."""
