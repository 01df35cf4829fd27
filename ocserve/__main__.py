"""`python -m ocserve` is `ocserve`."""

from ocserve.cli import main

if __name__ == "__main__":
    main(prog_name="ocserve")
