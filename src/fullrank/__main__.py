"""`python -m fullrank` is `fullrank`."""

from fullrank.cli.app import main

if __name__ == "__main__":
    main()
