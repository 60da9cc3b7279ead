"""The command line `qhal`. It may import every package of the project; nothing imports it."""
