package main

import (
	"context"
	"fmt"
	"runtime"
	"runtime/debug"
)

// version is what the build knows of itself: the module's version where it was installed as one, otherwise the commit.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	if v := info.Main.Version; v != "" && v != "(devel)" {
		return v
	}
	revision, changed := "", ""
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value[:min(len(s.Value), 12)]
		case "vcs.modified":
			if s.Value == "true" {
				changed = "+changes"
			}
		}
	}
	if revision == "" {
		return "devel"
	}
	return "devel-" + revision + changed
}

// versionCommand is `tidemark version`.
type versionCommand struct{}

// Run prints the version.
func (versionCommand) Run(_ context.Context, env *environment) error {
	_, err := fmt.Fprintf(env.stdout, "tidemark %s %s %s/%s\n", version(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
	return err
}
