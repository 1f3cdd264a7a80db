package gateway

import (
	"time"

	"google.golang.org/protobuf/types/known/timestamppb"

	"tidemark/internal/auth"
	"tidemark/schema"
)

// watch ends the connection when its token is no longer accepted. Called by the reader, once the peer is known.
func (c *conn) watch() {
	c.expiry = nil
	until := c.principal.Until
	if until.IsZero() {
		return
	}
	c.expiry = time.AfterFunc(time.Until(until), func() {
		c.fail(schema.Refuse(schema.Code_CODE_TOKEN_EXPIRED, "The connection's token expired; come again with a new one, from the last seq seen. A refresh before would have kept the connection."))
	})
}

// unwatch ends what watch began. Called when the reader and the writer have ended.
func (c *conn) unwatch() {
	if c.expiry != nil {
		c.expiry.Stop()
	}
}

// refresh puts a new token in the place of the connection's, and answers with refreshed. It must be for the same subject, tenant and role: who was let in stays who that was. Attachments to sessions that it
// gives no access to, and work for groups that hold such, end with forbidden. The error ends the connection. Called by the reader.
//
// It costs as much as an envelope: a signature is checked for it.
func (c *conn) refresh(token string) error {
	if err := c.spend(1, time.Now()); err != nil {
		return err
	}
	p, err := c.g.cfg.Verify(c.ctx, token)
	if err != nil {
		return err
	}
	old := c.principal
	if p.Subject != old.Subject || p.Tenant != old.Tenant || p.Role != old.Role {
		return schema.Refuse(schema.Code_CODE_FORBIDDEN, "The new token is another's: its subject, tenant and role must be those of the connection. Open another connection with it.")
	}
	if c.expiry != nil && !c.expiry.Stop() {
		// It came too late, and the connection is ending.
		return nil
	}
	c.principal = p
	c.watch()
	// Whether the new token gives access is asked anew of every session that is published to.
	clear(c.targets)
	// Marked before the answer: behind it nothing more comes of the sessions that end.
	var revoked []interface{ turn() }
	for _, a := range c.channels {
		if a.ended.Load() {
			continue
		}
		if err := Authorize(p, Follow, a.id.Name); err != nil {
			a.revoked.Store(schema.AsRefusal(err))
			revoked = append(revoked, a)
		}
	}
	for _, s := range c.mayWork(p) {
		revoked = append(revoked, s)
	}
	c.reply(&schema.ServerFrame{Frame: &schema.ServerFrame_Refreshed{Refreshed: &schema.Refreshed{Expires: expiresOf(p)}}})
	for _, s := range revoked {
		s.turn()
	}
	return nil
}

// expiresOf is when the token expires, as frames say it; nil for one that does not.
func expiresOf(p *auth.Principal) *timestamppb.Timestamp {
	if p.Expires.IsZero() {
		return nil
	}
	return timestamppb.New(p.Expires)
}
