"""Times the candidates of every tile on the user's GPU; ``vit-triton tune`` is the command."""
