"""Three small teachers for Theia whose trained weights come from package indexes."""
