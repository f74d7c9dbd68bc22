"""What a row holds, before any token: the formats, and the conversation, prompt or text that each is read as."""
