"""Where computed prefixes go when the device's KV pool needs their cells: host memory, then disk."""
