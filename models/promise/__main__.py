"""``python -m models.promise``."""

from models.promise.command import main

if __name__ == "__main__":
    main()
