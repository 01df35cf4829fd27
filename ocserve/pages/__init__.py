"""Pages that the server publishes: self-contained HTML, light and dark, without scripts."""
