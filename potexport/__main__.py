"""`python -m potexport`."""

from potexport.cli import main

if __name__ == "__main__":
    main()
