"""Ready-to-run configurations; `fit --config NAME.yaml` finds them because the plugin names this package."""
