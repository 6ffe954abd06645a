"""Public models on real samples: fetched by package name, optimized, checked and tabulated."""
