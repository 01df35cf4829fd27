"""The audit behind `ocserve check`: what providers are asked for, item by item, and the probes that prove it."""
