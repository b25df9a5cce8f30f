"""Where the pieces of a matrix lie, and how to multiply a matrix that lies in pieces."""
