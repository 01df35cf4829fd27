"""Content policy: prompts and answers are put before whoever the operator chooses, and its word holds."""
