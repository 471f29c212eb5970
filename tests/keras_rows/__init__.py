"""What Keras has, one small model each: the rows of docs/what-trains.md, and tests of all of them on two ranks."""
