"""The inspector under load: a hundred scripted agents in real time, pictures, what it costs."""
