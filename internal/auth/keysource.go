package auth

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Bounds of reading a JWKS.
const (
	// JWKSTimeout bounds one read over HTTP, from the connection to the last byte.
	JWKSTimeout = 5 * time.Second
	// JWKSMaxBytes bounds a set: some thousand keys, of which issuers have two or three.
	JWKSMaxBytes = 1 << 20
	// jwksRedirects bounds the redirects that one read follows.
	jwksRedirects = 3
)

// errUnchanged: the file is the one that was read last.
var errUnchanged = errors.New("unchanged")

// keySource is where a JWKS is read. It belongs to whoever reads, one at a time.
type keySource struct {
	name   Source
	path   string // of a file; empty where it is a URL
	url    *url.URL
	client *http.Client
	// seen is the file that was read last; nil where it is to be read in any case.
	seen fs.FileInfo
}

// Source names where a JWKS is: a file, or a URL that begins with https:// or http://. A URL may hold what is not for everybody's eyes.
type Source string

// parse tells a file, for which it returns nil, from a URL.
func (s Source) parse() (*url.URL, error) {
	if !strings.Contains(string(s), "://") {
		return nil, nil
	}
	u, err := url.Parse(string(s))
	if err != nil || u.Host == "" || u.Scheme != "https" && u.Scheme != "http" {
		// Not the error: it repeats the URL.
		return nil, errors.New("the JWKS must be a file, or a URL that begins with https:// or http://")
	}
	return u, nil
}

// Check says what is wrong with the name, without repeating it. It reads nothing.
func (s Source) Check() error {
	_, err := s.parse()
	return err
}

// String is the source without what may be secret in a URL: who asks, and with which query.
func (s Source) String() string {
	switch u, err := s.parse(); {
	case err != nil:
		return "(not a URL)"
	case u == nil:
		return string(s)
	default:
		return (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path}).String()
	}
}

// newKeySource reads nothing.
func newKeySource(where Source, transport http.RoundTripper) (*keySource, error) {
	u, err := where.parse()
	if err != nil {
		return nil, err
	}
	if u == nil {
		return &keySource{name: where, path: string(where)}, nil
	}
	if transport == nil {
		transport = &http.Transport{
			Proxy: http.ProxyFromEnvironment,
			// One request in minutes: a connection that waits for the next would only be cut.
			DisableKeepAlives: true,
		}
	}
	return &keySource{name: where, url: u, client: &http.Client{
		Transport: transport,
		CheckRedirect: func(r *http.Request, via []*http.Request) error {
			switch {
			case len(via) > jwksRedirects:
				return fmt.Errorf("it was redirected more than %d times", jwksRedirects)
			case r.URL.Scheme != "https" && via[len(via)-1].URL.Scheme == "https":
				// Who sits between could put keys of their own into the set.
				return errors.New("it was redirected from https to what is not")
			}
			return nil
		},
	}}, nil
}

// String names the source without what may be secret in it.
func (s *keySource) String() string { return s.name.String() }

// open says whether others on the way could change what is read.
func (s *keySource) open() bool {
	if s.url == nil || s.url.Scheme == "https" {
		return false
	}
	ip := net.ParseIP(s.url.Hostname())
	return s.url.Hostname() != "localhost" && (ip == nil || !ip.IsLoopback())
}

// read reads the set, at most [JWKSMaxBytes]. A file that is the one read last is errUnchanged, unless seen was set to nil.
func (s *keySource) read(ctx context.Context) ([]byte, error) {
	if s.url != nil {
		return s.fetch(ctx)
	}
	return s.readFile()
}

func (s *keySource) readFile() ([]byte, error) {
	info, err := os.Stat(s.path)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is not a file", s.path) // and reading a pipe might never end
	case s.seen != nil && os.SameFile(info, s.seen) && info.Size() == s.seen.Size() && info.ModTime().Equal(s.seen.ModTime()):
		return nil, errUnchanged
	}
	f, err := os.Open(s.path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	// Looked at before it is read: what is written meanwhile makes it another one next time.
	if info, err = f.Stat(); err != nil {
		return nil, err
	}
	b, err := readBounded(f)
	if err != nil {
		return nil, err
	}
	s.seen = info
	return b, nil
}

// fetch reads the set over HTTP. Its errors do not repeat the URL.
func (s *keySource) fetch(ctx context.Context) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, JWKSTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, s.url.String(), nil)
	if err != nil {
		return nil, errors.New("the request cannot be made")
	}
	r.Header.Set("Accept", "application/jwk-set+json, application/json")
	answer, err := s.client.Do(r)
	if err != nil {
		if u, ok := errors.AsType[*url.Error](err); ok {
			err = u.Err
		}
		return nil, err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("it was answered with status %d", answer.StatusCode)
	}
	return readBounded(answer.Body)
}

func readBounded(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, JWKSMaxBytes+1))
	if err == nil && len(b) > JWKSMaxBytes {
		return nil, errors.New("it is larger than 1 MiB")
	}
	return b, err
}
