"""`python -m edgecl`: the terminal app of this very Python, which is what a timer starts."""

from .cli import main

if __name__ == "__main__":
    main()
