"""The inspector under load: a hundred scripted agents in real time, pictures of it, what it costs."""
