"""Small networks, trained on Fashion-MNIST, that the examples and benchmarks factorize."""
