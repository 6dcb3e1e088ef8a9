"""A trained model taken elsewhere: one GGUF file for llama.cpp, a Modelfile for Ollama, a repository of the hub."""
