"""The command ``python -m models.zoo``."""

from models.zoo.command import main

if __name__ == "__main__":
    main()
