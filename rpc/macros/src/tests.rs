// Tests follow the expansion.
