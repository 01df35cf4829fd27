"""Who may, how much, what was used."""
