"""GroupMamba's mixer on a GPU: all between its norm and its last projection as one operation."""
