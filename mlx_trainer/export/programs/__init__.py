"""Hand-over to programs with formats of their own: llama.cpp, Ollama, LM Studio."""
