package main

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/alecthomas/kong"
	"go.yaml.in/yaml/v3"

	"tidemark/schema"
)

// Settings have one name each, the flag's. They come from the command line, from the environment (TIDEMARK_NAME), from the file of --config, or are defaults, in this order.

// secretText is a setting that is never shown. On the command line other users of the machine can see it, so its place is the environment, the file, or a file of its own.
type secretText string

// serverURL is the address of a server, with a password in it perhaps.
type serverURL string

// settings finds what was not given on the command line. It implements [kong.Resolver].
type settings struct {
	lookup func(string) (string, bool)
	path   string // of the file; empty where there is none
	file   map[string]string
}

// findSettings reads the configuration file that the arguments or the environment name. The file may hold settings of all commands, and nothing else.
func findSettings(app *kong.Application, env *environment, args []string) (*settings, error) {
	s := &settings{lookup: env.lookup, file: map[string]string{}}
	s.path = configPath(args)
	if s.path == "" {
		s.path, _ = s.fromEnvironment("config")
	}
	if s.path == "" {
		return s, nil
	}
	b, err := os.ReadFile(s.path)
	if err != nil {
		return nil, fmt.Errorf("the configuration file cannot be read: %w", err)
	}
	var keys map[string]yaml.Node
	if err := yaml.Unmarshal(b, &keys); err != nil {
		return nil, fmt.Errorf("the configuration file %s is not YAML as it should be: %w", s.path, err)
	}
	known := flagNames(app.Node)
	for key, node := range keys {
		if !slices.Contains(known, key) || key == "config" || key == "help" {
			return nil, fmt.Errorf("the configuration file %s names %q in line %d, which is no setting; settings are named as flags are, without their dashes", s.path, key, node.Line)
		}
		value, ok := scalar(&node)
		if !ok {
			return nil, fmt.Errorf("the configuration file %s gives %q in line %d neither one value nor a list of them", s.path, key, node.Line)
		}
		s.file[key] = value
	}
	return s, nil
}

// configPath is the value of --config in the arguments.
func configPath(args []string) string {
	for i, a := range args {
		switch {
		case a == "--":
			return ""
		case a == "--config" && i+1 < len(args):
			return args[i+1]
		case strings.HasPrefix(a, "--config="):
			return strings.TrimPrefix(a, "--config=")
		}
	}
	return ""
}

// scalar is a node as it would stand on the command line. Its text is taken as it is written, so that nothing YAML makes of 08 or yes gets in between.
func scalar(n *yaml.Node) (string, bool) {
	switch n.Kind {
	case yaml.ScalarNode:
		return n.Value, true
	case yaml.SequenceNode:
		var parts []string
		for _, item := range n.Content {
			if item.Kind != yaml.ScalarNode {
				return "", false
			}
			parts = append(parts, kong.JoinEscaped([]string{item.Value}, ','))
		}
		return strings.Join(parts, ","), true
	case yaml.DocumentNode, yaml.MappingNode, yaml.AliasNode:
	}
	return "", false
}

func flagNames(n *kong.Node) []string {
	var names []string
	for _, f := range n.Flags {
		names = append(names, f.Name)
	}
	for _, child := range n.Children {
		names = append(names, flagNames(child)...)
	}
	return names
}

// Validate implements [kong.Resolver].
func (s *settings) Validate(*kong.Application) error { return nil }

// Resolve implements [kong.Resolver].
func (s *settings) Resolve(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
	if value, from := s.find(flag.Name); from != "" {
		return value, nil
	}
	return nil, nil
}

// find returns a setting and says where it comes from; empty where it is in neither place. One that is set to nothing counts as not set.
func (s *settings) find(name string) (value, from string) {
	if name == "help" {
		return "", ""
	}
	if value, ok := s.fromEnvironment(name); ok {
		return value, "environment " + variable(name)
	}
	if value := s.file[name]; value != "" {
		return value, "file " + s.path
	}
	return "", ""
}

// fromEnvironment finds a setting's variable.
func (s *settings) fromEnvironment(name string) (string, bool) {
	value, _ := s.lookup(variable(name))
	return value, value != ""
}

func variable(name string) string {
	return "TIDEMARK_" + strings.ToUpper(strings.ReplaceAll(name, "-", "_"))
}

// configCommand prints the effective settings of a command.
type configCommand struct {
	Args []string `arg:"" optional:"" help:"A command, dev where none is named, and flags for it."`
}

// Run prints a file that --config would take, with where each setting comes from.
func (c *configCommand) Run(_ context.Context, env *environment) error {
	args := c.Args
	if slices.Contains(args, "--help") || slices.Contains(args, "-h") {
		fmt.Fprintln(env.stdout, "Usage: tidemark config [COMMAND] [FLAGS]\n\nPrint the effective settings of a command, dev where none is named, and where each comes from.")
		return nil
	}
	if len(args) == 0 || strings.HasPrefix(args[0], "-") {
		args = append([]string{"dev"}, args...)
	}
	// The flags before the word config count too.
	args = append(slices.Clone(env.args[:len(env.args)-len(c.Args)-1]), args...)
	exited := -1
	parser, err := newParser(new(commands), env, &exited)
	if err != nil {
		return err
	}
	s, err := findSettings(parser.Model, env, args)
	if err != nil {
		return usageError{err}
	}
	if err := kong.Resolvers(s).Apply(parser); err != nil {
		return err
	}
	// What Parse does, but for the check that nothing required is missing.
	traced, err := kong.Trace(parser, args)
	if err == nil {
		err = traced.Error
	}
	if err == nil {
		err = errors.Join(traced.Reset(), traced.Resolve())
	}
	if err == nil {
		_, err = traced.Apply()
	}
	if err != nil {
		return usageError{err}
	}
	command := traced.Selected()
	if command == nil {
		return usage("no command is named whose settings to print")
	}
	given := map[string]bool{}
	for _, p := range traced.Path {
		if p.Flag != nil && !p.Resolved {
			given[p.Flag.Name] = true
		}
	}
	fmt.Fprintf(env.stdout, "# tidemark %s\n", command.Path())
	for _, f := range traced.Flags() {
		if f.Name == "help" || f.Name == "config" {
			continue
		}
		_, from := s.find(f.Name)
		switch {
		case given[f.Name]:
			from = "flag"
		case from == "":
			from = "default"
		}
		fmt.Fprintf(env.stdout, "%-40s # %s\n", f.Name+": "+shown(f.Target), from)
	}
	return nil
}

// shown is a setting's value as it may stand in a file and be seen by anybody.
func shown(v reflect.Value) string {
	var value any
	switch x := v.Interface().(type) {
	case secretText:
		if x == "" {
			return `""`
		}
		return "(secret)"
	case serverURL:
		value = redacted(string(x))
	case fmt.Stringer:
		value = x.String()
	default:
		value = x
	}
	b, err := yaml.Marshal(value)
	if err != nil {
		return "?"
	}
	text := strings.TrimSpace(string(b))
	if v.Kind() == reflect.Slice {
		var items []string
		for i := range v.Len() {
			items = append(items, shown(v.Index(i)))
		}
		text = "[" + strings.Join(items, ", ") + "]"
	}
	return text
}

// redacted is a list of URLs without passwords.
func redacted(urls string) string {
	var parts []string
	for s := range strings.SplitSeq(urls, ",") {
		if u, err := url.Parse(s); err == nil && u.User != nil {
			s = u.Redacted()
		} else if _, host, ok := strings.Cut(s, "@"); ok {
			s = "xxxxx@" + host
		}
		parts = append(parts, s)
	}
	return strings.Join(parts, ",")
}

// moment is a time among the settings; where it is zero, there is none.
type moment struct{ time.Time }

func (m moment) String() string {
	if m.IsZero() {
		return ""
	}
	return m.Format(time.RFC3339Nano)
}

// UnmarshalText is called by kong.
func (m *moment) UnmarshalText(text []byte) error {
	if len(text) == 0 {
		*m = moment{}
		return nil
	}
	t, err := time.Parse(time.RFC3339, string(text))
	if err != nil {
		return fmt.Errorf("%q is not a time in the form of RFC 3339; give date, time and zone, as 2025-11-04T10:00:15Z or 2025-11-04T11:00:15.250+01:00", text)
	}
	m.Time = t
	return nil
}

// sentence is an error as people read it: refusals without their code's word before the sentence, and what caused them behind it.
func sentence(err error) string {
	r, ok := errors.AsType[*schema.Refusal](err)
	if !ok {
		return strings.TrimPrefix(strings.TrimPrefix(err.Error(), "client: "), "natsd: ")
	}
	text := r.Message + " (" + r.Code.Word() + ")"
	if r.Err != nil {
		text += ": " + r.Err.Error()
	}
	return text
}
