"""The commands beside `train`, a file each, whose `main(args)` returns the exit status."""
