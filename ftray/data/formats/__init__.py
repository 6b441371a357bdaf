"""One module for each kind of source file: how it is cut into work units, and its rows."""
