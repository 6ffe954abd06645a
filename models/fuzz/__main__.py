"""The command ``python -m models.fuzz``."""

from models.fuzz.command import main

if __name__ == "__main__":
    main()
