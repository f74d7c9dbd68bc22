"""Where rows come from: files, folders, Hugging Face datasets; their lines, and what they call their fields."""
