"""Print the table of docs/config.md."""

from medfuse_jax import config

if __name__ == "__main__":
    print(config.table())
