"""What the composition root hands to the server beside requests: which models are served, and administration."""
